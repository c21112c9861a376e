"""What every room uses: errors, files, resumable work, progress, units, this machine."""

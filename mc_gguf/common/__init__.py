"""What every room uses: errors, files, working directories, progress, units, this machine."""

"""What downloads leave behind is recognised, and files of models are not taken for it."""

from __future__ import annotations

import pytest

from mc_gguf.common.downloads import placeholder
from tests.support import TINY

PLACEHOLDERS = {
    b"": "is empty",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0": "is a Git LFS pointer",
    b"\xef\xbb\xbf\n<!DOCTYPE html>": "is a web page",
    b"<HTML lang=en>": "is a web page",
    b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>': "is a web page",
    b"Invalid username or password.": "is a web page or an error message",
    b"PK\x03\x04\x00": "is a ZIP archive",
    b"\x1f\x8b\x08": "is a gzip archive",
}


@pytest.mark.parametrize("head", PLACEHOLDERS)
def test_placeholders(head: bytes) -> None:
    found = placeholder(head)
    assert found is not None
    assert found.startswith(PLACEHOLDERS[head])
    assert "; " in found  # what to do


@pytest.mark.parametrize("head", [b"GGUF\x03\0\0\0", b'{"metadata": {}}', b"{}", b"[]", b"#version: 0.2"])
def test_what_files_of_models_begin_with(head: bytes) -> None:
    assert placeholder(head) is None


def test_the_bundled_model_is_no_placeholder() -> None:
    for path in TINY.iterdir():
        assert placeholder(path.read_bytes()[:512]) is None

"""Command lines over the package: make, convert, merge and verify model folders."""

"""Ours and the peers side by side: time with its accuracy. See README.md."""

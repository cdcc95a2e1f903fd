"""Pure maths: no files, no network, no console."""

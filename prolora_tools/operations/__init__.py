"""One use case a file; each opens its inputs, does the work and returns a report."""

"""docs/performance.md, its figures and the README's table, from the result files."""

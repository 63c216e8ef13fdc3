"""The generated pages and figures."""

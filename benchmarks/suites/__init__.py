"""The suites of `fusedacl bench`."""

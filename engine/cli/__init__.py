"""The `fusedacl` command."""

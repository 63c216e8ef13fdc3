"""Options of every command, from the command line and from YAML."""

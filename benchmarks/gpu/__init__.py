"""A session of some minutes on a GPU machine on which nothing can be installed but this package."""

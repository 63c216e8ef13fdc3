"""Compilation of every kernel for every supported GPU, without one."""

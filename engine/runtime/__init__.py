"""Processes, devices, dropout, files, locks and plots; nothing here knows a model or a loss."""

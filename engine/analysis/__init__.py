"""What runs are worth: figures, tables and pages from the directories that they left."""

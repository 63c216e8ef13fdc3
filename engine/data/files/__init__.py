"""Files of tables: csv, tsv, jsonl, json and parquet, read and refused row by row."""

"""The DeepSpeed backend and its adapters for ZeRO."""

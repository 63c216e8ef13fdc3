"""What a run tells while it trains: its records, and the services that receive them."""

"""Records of a run while it trains, and the services that receive them."""

"""What a run decides about its own objective, before and while it trains."""

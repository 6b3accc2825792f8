"""What a run decides about its own objective: before it begins (planner) and while it trains (controllers)."""

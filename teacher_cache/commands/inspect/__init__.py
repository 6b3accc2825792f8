"""inspect: what a sealed cache holds, in words, as a page, or segment by segment."""

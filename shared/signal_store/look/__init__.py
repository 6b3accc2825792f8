"""What people see of a cache: decoded arrays with names and units, text with token boundaries, summaries, plots, pages.

Nothing here writes to a cache, and nothing is imported before it is asked for: pandas, xarray and matplotlib are the extra
`inspect`.
"""

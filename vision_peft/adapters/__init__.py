"""The catalogue: one file a method, found by its name; files that start with an underscore hold what several share."""

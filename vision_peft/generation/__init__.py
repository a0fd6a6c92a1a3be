"""Generated pictures: sampling from an adapted generator, and measures of what it reached."""

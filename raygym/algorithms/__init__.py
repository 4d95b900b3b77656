"""Published methods, one short function each."""

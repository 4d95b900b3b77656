"""`raygym view`: a run's folder as a local web page. Read-only, on the loopback interface only."""

"""What tests of raygym use and tests of your own environments and runs can use: `chaos` injects faults."""

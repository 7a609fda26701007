"""What more pruning would cost: laws fitted to measured points, and compared on held-out points."""

"""What more pruning would cost: laws fitted to measured points, compared by what they say of points held out."""

"""What everything that trains shares: the windows of a step, and the state that an interrupted run goes on from."""

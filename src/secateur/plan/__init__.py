"""Plans: what to keep, chosen from scores, rates and patterns."""

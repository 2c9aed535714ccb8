"""What may be claimed: pairs, statistics, gates and their rules, ablations, failures, the decision."""

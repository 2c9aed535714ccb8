"""What runs where and in which order: profiles, phases, the runner, Kaggle, many machines."""

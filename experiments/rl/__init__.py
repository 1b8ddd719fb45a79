"""Deep reinforcement learning: PPO whose actor and critic start, and stay, sparse."""

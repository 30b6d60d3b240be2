"""Reinforcement learning on sampled responses: the programs of which a PPO iteration is made."""

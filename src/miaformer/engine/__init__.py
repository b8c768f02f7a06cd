"""How decisions are carried out: attention backends, and the masked and sparse executions of one definition."""

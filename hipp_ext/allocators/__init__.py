"""How many units of every group stay."""

"""Where the Fisher curves are anchored: which groups are measured, at which level, on which rows."""

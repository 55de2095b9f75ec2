"""The command line: one Hydra command per file, composed from the groups in conf/."""

"""The configuration groups. Installed as lightning_lora.conf: another Hydra application takes them by the search path
entry pkg://lightning_lora.conf."""

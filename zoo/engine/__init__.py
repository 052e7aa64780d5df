"""Training from YAML: LightningCLI with run directories, exact resume, reports and short error messages."""

"""The processes of Lamina: where they are, who starts them again, who ends them."""

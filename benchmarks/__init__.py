"""What measures speed and quality; `mae-et bench` and scripts of their own."""

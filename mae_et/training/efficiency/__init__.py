"""What makes a step faster or smaller, and changes no numbers beyond rounding."""

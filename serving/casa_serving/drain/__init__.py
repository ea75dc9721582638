"""How a server ends: what runs may finish within a bound, everything else is told, and the process leaves."""

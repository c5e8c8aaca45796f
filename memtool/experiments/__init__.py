"""Many runs, or many versions, of any method: ablations, and the commit that spoiled a memory."""

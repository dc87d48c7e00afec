"""What a language model costs and how fast it is on hardware that is not here (spec 1, 2, 5, 6, 10).

`inputs` and `traces` are what is given, `roofline` the closed forms, `steps` the time of one iteration,
`replay` the discrete events, `planner` the choice between set-ups, `calibration` and `truth` what this
machine has to say about it. Every figure that comes out of here is simulated unless it says measured.
"""

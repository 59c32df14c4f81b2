"""The evaluations of the FR-Spec paper (arXiv 2502.14856): Spec-Bench, HumanEval and GSM8K.

run        a whole evaluation: plan, questions, results; where to start reading
tasks      the tasks; questions from files (datafiles), and how they are put to a model (prompts)
methods    what is compared
worker     a worker's part: one question through all methods
pool       the generators that it keeps
schedule   questions over workers: in this process, in others (process_workers), with Ray
results    the JSON Lines file that a killed run goes on from; fingerprint: what it is a run of
scoring    correctness of answers; humaneval: its programs; sandbox: where generated code runs
statistics, report, plots: tables and figures
"""

"""The evaluations of the FR-Spec paper (arXiv 2502.14856): Spec-Bench, HumanEval and GSM8K.

tasks      questions and how they are put to a model
methods    what is compared
generate   a worker's part: one question through all methods
schedule   questions over workers: in this process, in others (process_workers), with Ray
results    the JSON Lines file that a killed run goes on from
scoring    correctness of answers; sandbox: where generated code runs
statistics, report, plots: tables and figures
"""

"""The YMIR executor: the platform's files on one side, trainer and detector on the other."""

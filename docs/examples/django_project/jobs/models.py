"""One model, so that tasks have something to read and write."""

from django.db import models


class Order(models.Model):
    """An order and what became of it."""

    amount = models.IntegerField()
    receipt = models.CharField(max_length=100, blank=True)

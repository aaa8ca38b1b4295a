// The kernels of the widest vectors that this machine has.
#pragma once
#include "form.h"

int run(const Form& form, const Call& call);  // 0: done. 1: no memory. 2: no such dtype.
int vector_width();                           // 0: AVX-512, 1: AVX2, 2: what every machine of its kind has
void set_vector_width(int wanted);            // for tests: narrower vectors than the machine has

// Compiled once for each instruction set: the table of its kernels.
//
// Kernel sources use nothing that the linker could share between variants: no standard templates, and every
// inline function of ours in the variant's namespace. Else the scalar path might run code made for AVX-512.
#include "kernels.hpp"

#define ABYSSAL_STRING_OF(x) #x
#define ABYSSAL_STRING(x) ABYSSAL_STRING_OF(x)

namespace abyssal::ABYSSAL_ISA {

#define ABYSSAL_OP(name, Args) void name(const Args&);
#include "ops.inc"
#undef ABYSSAL_OP

extern const Kernels table;
const Kernels table = {
    ABYSSAL_STRING(ABYSSAL_ISA),
#define ABYSSAL_OP(name, Args) name,
#include "ops.inc"
#undef ABYSSAL_OP
};

}  // namespace abyssal::ABYSSAL_ISA
